"""The steps of the road; reading the file names in the order of `pipeline.STAGES` tells the story."""
