"""The starter chats that `kolotune init` copies into a new folder."""
