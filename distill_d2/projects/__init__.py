"""The detectors of ``projects/<Name>/<package>``, importable as ``distill_d2.projects.<package>``.

An installed distill_d2 has them inside this folder; a checkout has them in ``projects/`` beside the
package, which is added to this package's search path. Importing this module registers all of them.
"""

import importlib
import pkgutil
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
if (_ROOT / "setup.py").is_file():  # a checkout, not somebody's site-packages/projects
    __path__ += [str(folder) for folder in sorted(_ROOT.glob("projects/*")) if folder.is_dir()]

for _module in pkgutil.iter_modules(__path__):
    if _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")
