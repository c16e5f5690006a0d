"""From rendered chats to token ids."""
