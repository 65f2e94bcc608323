"""The detectors of ``projects/<Name>/<package>``, importable as ``distill_d2.projects.<package>``.

An installed distill_d2 has them inside this folder; a checkout has them in ``projects/`` beside the
package, which is added to this package's search path. Importing a package registers its detector;
``distill_d2.plugins`` does so when detectron2 looks up a name of that detector.
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
if (_ROOT / "setup.py").is_file():  # a checkout, not somebody's site-packages/projects
    __path__ += [str(folder) for folder in sorted(_ROOT.glob("projects/*")) if folder.is_dir()]
