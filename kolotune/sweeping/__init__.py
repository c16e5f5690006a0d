"""`kolotune sweep`: several settings as runs over the same prepared chats; the best by held-out loss goes on."""
