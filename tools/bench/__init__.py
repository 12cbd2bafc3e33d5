"""Commands for developers: they measure, and stay out of the wheel."""
