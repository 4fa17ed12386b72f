"""The ops: one file a family, with its schema, its fake and its autograd; ``_check`` is the only validation gate."""
