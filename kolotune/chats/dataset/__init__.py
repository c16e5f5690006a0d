"""The prepared data set: chunks of chats, held-out split, near-duplicates, and the row store on disk."""
