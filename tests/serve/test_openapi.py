"""/openapi.json describes the server, and schemathesis finds no body that breaks it."""

from __future__ import annotations

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.running import Running, running
from vlmport.serve.app import create_app

APP = create_app({"shapes": "shapes"})
schema = schemathesis.openapi.from_dict(json.loads(json.dumps(APP.openapi())))
CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


@pytest.fixture(scope="module")
def shapes() -> object:
    with running({"shapes": "shapes"}) as server:
        yield server


@schema.parametrize()
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_no_body_breaks_the_server(case: schemathesis.Case, shapes: Running) -> None:
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = "shapes"  # most bodies end at an unknown name otherwise
    case.call_and_validate(base_url=shapes.url, checks=CHECKS)


def test_the_document_has_the_bodies() -> None:
    document = APP.openapi()
    chat = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert chat["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert "temperature" in document["components"]["schemas"]["ChatRequest"]["properties"]
