"""What every other part of ``ir`` stands on: types, weights, the view, errors."""
