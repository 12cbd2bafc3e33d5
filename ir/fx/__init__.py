"""The view over ``torch.fx`` graphs."""
