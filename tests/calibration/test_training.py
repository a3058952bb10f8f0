"""The training forward pass gives what transformers gives for one question at a time."""

from random import Random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from calibration.batches import IGNORE, Packer, draw_batch  # noqa: E402
from calibration.evaluate import REFERENCE, Reference  # noqa: E402
from calibration.network import Trainee, patchify  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (REFERENCE / "model.safetensors").exists(), reason="the checkpoint is not in this checkout"
)


@torch.no_grad()
def test_packed_questions_score_as_single_requests():
    plain, trained = Reference(), Reference()
    packer = Packer(trained.processor.tokenizer)
    batch = draw_batch("train", Random(3), packer, patches=600, questions=4)
    trainee = Trainee(trained.model)
    logits = trainee.answer(trainee.encode(batch.images), batch)
    row, number = 1, 3
    question = batch.questions[row][number - 1]
    content = [
        {"type": "image", "image": question.image},
        {"type": "text", "text": question.prompt},
    ]
    inputs = plain.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    pixels = patchify(batch.images).unflatten(0, (len(batch.images), -1))[row]
    torch.testing.assert_close(pixels, inputs["pixel_values"], atol=1e-5, rtol=0)

    answer = torch.tensor([[*packer.encode(question.answer), packer.end]])
    inputs["input_ids"] = torch.cat((inputs["input_ids"], answer), dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    types = (inputs["mm_token_type_ids"], torch.zeros_like(answer))
    inputs["mm_token_type_ids"] = torch.cat(types, dim=1)
    expected = plain.model(**inputs).logits[0, -answer.shape[1] - 1 : -1]

    labelled = batch.labels != IGNORE
    ours = torch.zeros(*labelled.shape, logits.shape[-1])
    ours[labelled] = logits
    got = ours[row][labelled[row] & (batch.segment[row] == number)]
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
