"""What a model keeps for its backward pass: a formula for each kind of layer, and what is measured."""
