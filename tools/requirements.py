"""Print the requirements of barefoot's extras, one a line: ``requirements.py test reference``.

So that an extra can be installed without building the package again.
"""

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

extras = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]
print("\n".join(requirement for name in sys.argv[1:] for requirement in extras[name]))
