"""What a compiled model is described by: round trip through the manifest, lookup by role."""

from __future__ import annotations

import json

import pytest

from glmcompile.contract import KEY_CACHE, LOGITS, TOKEN_IDS, Attention, Contract
from tests.contracts import LAYER, decoder_ports, image_contract, text_contract

CONTRACTS = {
    "text": text_contract(),
    "image": image_contract(),
    "spans": image_contract(spans="image_runs"),
    "layers that differ": text_contract(attention=(LAYER, Attention(8, 1, 32, 64, window=16))),
}


@pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS)
def test_a_contract_survives_json(contract: Contract) -> None:
    data = json.loads(json.dumps(contract.to_json()))
    assert Contract.from_json(data) == contract


@pytest.mark.parametrize(
    "change",
    [
        {"vision": {"token_id": 1}},
        {"attention": [{"heads": 4}]},
        {"components": {"decoder": {"inputs": [{"name": "input_ids"}], "outputs": []}}},
        {"components": {"decoder": {"inputs": []}}},
        {"layers": 4},
        {"eos_token_ids": None},
    ],
    ids=str,
)
def test_what_was_not_written_by_it_is_refused(change: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError)):
        Contract.from_json(text_contract().to_json() | change)


def test_ports_are_found_by_role_in_the_order_of_their_numbers() -> None:
    wide = Attention(8, 8, 32, 64)
    decoder = decoder_ports((LAYER, wide))
    found = decoder.having(KEY_CACHE)
    assert [(port.name, port.shape[2:]) for port in found] == [
        ("key_cache.0", (2, 16)),
        ("key_cache.1", (8, 32)),
    ]
    port = decoder.input(TOKEN_IDS)
    assert port is not None
    assert port.name == "input_ids"
    assert decoder.input(LOGITS) is None


def test_a_text_model_has_no_encoder() -> None:
    assert text_contract().image_token_id is None
    with pytest.raises(KeyError):
        _ = text_contract().encoder
    assert image_contract().image_token_id == 9
    assert image_contract().encoder.outputs[0].name == "image_features"
