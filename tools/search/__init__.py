"""One budget over all knobs: what each choice would cost and hurt, solved, then measured."""
