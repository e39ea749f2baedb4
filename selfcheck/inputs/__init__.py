"""What the checks are fed: the pinned model and text, tensors of the model, random and adversarial ones, a witness."""
