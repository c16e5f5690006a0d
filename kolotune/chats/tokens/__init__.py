"""Token ids and labels of chats: the tokenizer, the encoder and the word cache."""
