"""Networks of other libraries and formats, here and there."""
