import pytest
from support.linears import PRECISIONS

from qpruner.plan import Precision


@pytest.fixture(params=PRECISIONS, ids=str)
def precision(request: pytest.FixtureRequest) -> Precision:
    return request.param
