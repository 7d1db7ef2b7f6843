"""One model and one compilation of its steps for all tests of the server."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving") / "gpt_oss"


@pytest.fixture(scope="session")
def model(folder: Path) -> Any:
    from tests.serving.common import make_model

    return make_model(folder)


@pytest.fixture(scope="session")
def steps(model: Any) -> Any:
    from tests.serving.common import make_steps

    return make_steps(model)


@pytest.fixture(scope="session")
def offline(model: Any) -> Any:
    from tests.serving.common import Offline

    return Offline(model)
