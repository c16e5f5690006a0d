"""The prepared data set: chunks, held-out split, near-duplicates, and the row store on disk."""
