"""The starter chats: `kolotune init` copies them into a new folder, and exported models are compared on them."""
