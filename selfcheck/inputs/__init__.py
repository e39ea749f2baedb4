"""What the checks are fed: the pinned model and text, tensors of models, hard ones, every layout of them, a witness."""
