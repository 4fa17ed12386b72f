"""Where the time of a training step goes: layer by layer, against what memory and arithmetic allow."""
