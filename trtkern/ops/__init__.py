"""The ops: one file a family, with its schema, its fake and its autograd; ``checks`` is the only validation gate."""
