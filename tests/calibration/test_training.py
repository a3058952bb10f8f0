"""The training forward pass gives what transformers gives for one question at a time."""

from random import Random

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from calibration.batches import IGNORE, Batch, Packer, collate, draw_batch  # noqa: E402
from calibration.conversations import (  # noqa: E402
    ask_steps,
    draw_mixed_batch,
    history,
    wander,
)
from calibration.evaluate import REFERENCE, Reference  # noqa: E402
from calibration.model import IMAGE_TOKENS  # noqa: E402
from calibration.muon import Muon, orthogonal  # noqa: E402
from calibration.network import Trainee, patchify  # noqa: E402
from calibration.phone import Phone, sizes_at  # noqa: E402
from calibration.phone_tasks import SYSTEM, tasks  # noqa: E402
from calibration.tasks import Sample  # noqa: E402
from calibration.words import WORDS  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (REFERENCE / "model.safetensors").exists(), reason="the checkpoint is not in this checkout"
)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def trainee() -> Trainee:
    return Trainee(Reference().model)


def expected_logits(reference: Reference, messages: list[dict], answer: list[int]):
    """Pixels, token ids, and the logits that transformers computes for each of the answer's tokens.

    messages: with Pillow images.
    """
    inputs = reference.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = torch.tensor([answer])
    inputs["input_ids"] = torch.cat((inputs["input_ids"], ids), dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    types = (inputs["mm_token_type_ids"], torch.zeros_like(ids))
    inputs["mm_token_type_ids"] = torch.cat(types, dim=1)
    logits = reference.model(**inputs).logits[0, -len(answer) - 1 : -1]
    return inputs["pixel_values"], inputs["input_ids"][0], logits


def user_turn(sample: Sample) -> dict:
    content = [{"type": "image", "image": sample.image}, {"type": "text", "text": sample.prompt}]
    return {"role": "user", "content": content}


def trained_logits(trainee: Trainee, batch: Batch, row: int, number: int) -> torch.Tensor:
    """The logits of one question's answer among those of a packed batch."""
    logits = trainee.answer(trainee.encode(batch.images), batch)
    labelled = batch.labels != IGNORE
    ours = torch.zeros(*labelled.shape, logits.shape[-1])
    ours[labelled] = logits
    return ours[row][labelled[row] & (batch.segment[row] == number)]


@torch.no_grad()
def test_packed_questions_score_as_single_requests(reference, trainee):
    packer = Packer(reference.processor.tokenizer)
    batch = draw_batch("train", Random(3), packer, patches=600, questions=4)
    row, number = 1, 3
    question = batch.questions[row][number - 1]
    answer = [*packer.encode(question.answer), packer.end]
    pixels, _, expected = expected_logits(reference, [user_turn(question)], answer)
    ours = patchify(batch.images).unflatten(0, (len(batch.images), -1))[row]
    torch.testing.assert_close(ours, pixels, atol=1e-5, rtol=0)
    got = trained_logits(trainee, batch, row, number)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_packed_conversations_score_as_requests_with_their_turns(reference, trainee):
    packer = Packer(reference.processor.tokenizer)
    phone, task = next(pair for pair in tasks("train", 6, scales=(1,)) if pair[1].path[1:])
    turns = wander(phone, task, 2, Random(0))
    asked = ask_steps(phone, task, 3, Random(1))
    batch = collate([phone.screen], [asked], packer, [history(turns)])
    messages = [{"role": "system", "content": SYSTEM}]
    for said, action in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": said}]})
        messages.append({"role": "assistant", "content": action})
    answer = [*packer.encode(asked[0].answer), packer.end]
    _, ids, expected = expected_logits(reference, [*messages, user_turn(asked[0])], answer)
    assert len(turns) == 2
    assert batch.ids[0, : len(ids)].tolist() == ids.tolist()
    got = trained_logits(trainee, batch, 0, 1)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_the_label_to_fetch_is_the_one_that_the_answer_is_about():
    packer = Packer(Reference().processor.tokenizer)
    batch = draw_mixed_batch("train", Random(4), packer, patches=3000, questions=6)
    seen = 0
    for row, questions in enumerate(batch.questions):
        for number, question in enumerate(questions, start=1):
            answering = (batch.segment[row] == number) & (batch.labels[row] != IGNORE)
            where = set(batch.fetched[row][answering].tolist())
            assert len(where) == 1
            at = where.pop()
            if question.kind == "step_back":
                assert at == -1
            elif question.about is not None:
                assert WORDS[batch.sought[row, at]] == question.about
                seen += 1
    assert seen > 5


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_the_processor_leaves_screens_of_every_scale_as_they_are(reference, scale):
    for size in sizes_at(scale):
        image = Phone("train", 0, scale, size).screen.image
        inputs = reference.processor.image_processor(image, return_tensors="pt")
        assert inputs["image_grid_thw"].tolist() == [[1, image.height // 14, image.width // 14]]
        pixels = patchify(torch.from_numpy(np.array(image))[None])
        torch.testing.assert_close(pixels, inputs["pixel_values"], atol=1e-5, rtol=0)


def test_the_processor_scales_screenshots_down_to_what_was_trained(reference):
    inputs = reference.processor.image_processor(
        Image.new("RGB", (1080, 2400)), return_tensors="pt"
    )
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    assert 0.9 * IMAGE_TOKENS < rows * columns // 4 <= IMAGE_TOKENS


def test_muon_makes_updates_orthogonal():
    torch.manual_seed(0)
    for shape in ((64, 32), (32, 64), (48, 48)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape), 5))
        assert values.min() > 0.4
        assert values.max() < 1.4


def test_muon_steps_down_a_slope():
    torch.manual_seed(0)
    matrix, wanted = torch.nn.Parameter(torch.zeros(16, 8)), torch.randn(16, 8)
    optimizer = Muon([matrix], lr=0.05, weight_decay=0.0)
    before = (matrix - wanted).pow(2).mean().item()
    for _ in range(200):  # of 0.01 each (root mean square), towards a distance of 1
        loss = (matrix - wanted).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (matrix - wanted).pow(2).mean().item() < before / 4
