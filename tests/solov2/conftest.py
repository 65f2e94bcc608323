import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS / "views"))  # for `import no_synchronisation`


@pytest.fixture
def tool(monkeypatch):
    """tools/check_golden.py."""
    monkeypatch.syspath_prepend(str(TESTS.parent / "tools"))
    import check_golden

    return check_golden
