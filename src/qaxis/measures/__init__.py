"""What is measured of a model: attention entropy and its scaling, perplexity and its change."""
