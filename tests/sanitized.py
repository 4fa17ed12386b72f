"""Runs pytest on a CPU extension that stands elsewhere: ``python tests/sanitized.py FOLDER [arguments of pytest]``.

FOLDER is where ``python setup.py build_ext --build-lib FOLDER`` put it; ``make sanitize`` builds one with sanitizers.
"""

import importlib.util
import sys
from pathlib import Path

import torch  # noqa: F401  (first: the extension shares its OpenMP)


def main() -> int:
    (path,) = (Path(sys.argv[1]) / "trtkern").glob("_cpu*.so")
    spec = importlib.util.spec_from_file_location("trtkern._cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["trtkern._cpu"] = module
    import trtkern

    trtkern._cpu = module
    import pytest

    return pytest.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
