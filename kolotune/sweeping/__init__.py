"""`kolotune sweep`: try several settings as runs over the same chats; the best by held-out loss is finished."""
