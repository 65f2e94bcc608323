import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
for folder in ("fcos", "views"):  # for `import fcos_case`, `import no_synchronisation`
    sys.path.insert(0, str(TESTS / folder))


@pytest.fixture
def tool(monkeypatch):
    """tools/check_golden.py."""
    monkeypatch.syspath_prepend(str(TESTS.parent / "tools"))
    import check_golden

    return check_golden
