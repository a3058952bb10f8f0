"""Training batches of agents' conversations and of screens at several scales.

Of each batch's screens some are pages of a simulated phone, with a system prompt and the turns
before; the others are asked the single questions of `batches.py`. All are of one size.
"""

from random import Random

from calibration.batches import Batch, Packer, ask_many, choose_layouts, collate
from calibration.model import PREFIX, TURN
from calibration.phone import Phone, element_at, parse
from calibration.phone_tasks import (
    SYSTEM,
    TASK_KINDS,
    Task,
    make_task,
    possible,
    prompt,
    right_action,
)  # fmt: skip
from calibration.screens import Look, Screen, draw
from calibration.tasks import Sample, tap

PHONES = 0.6  # part of the screens that are a phone's
ASTRAY = 0.15  # part of the steps before that were wrong
_SHAPES = {  # size of the layout and scale
    ((168, 336), 1): 0.26, ((196, 364), 1): 0.14, ((224, 392), 1): 0.13, ((336, 168), 1): 0.08,
    ((168, 336), 2): 0.13, ((196, 364), 2): 0.07, ((224, 392), 2): 0.07, ((168, 336), 3): 0.12,
}  # fmt: skip
_TASK_WEIGHTS = {"open": 1, "select": 1, "press": 1, "confirm": 2, "fill": 3, "submit": 4}
_NEXT = (0.55, 0.75)  # up to where a chance means a task that goes on from here, or ends here


def history(turns: list[tuple[str, str]]) -> str:
    """The rendered conversation up to the picture of the next turn; turns: prompt and answer."""
    said = "".join(f"<|user|>\n{asked}{TURN}{answer}" for asked, answer in turns)
    return f"[gMASK]<sop><|system|>\n{SYSTEM}{said}<|user|>\n<|begin_of_image|>"


def wander(phone: Phone, task: Task, steps: int, rng: Random) -> list[tuple[str, str]]:
    """Works on the task for `steps` steps, some of them wrong; returns the turns."""
    turns = []
    for _ in range(steps):
        answer, _ = right_action(phone, task)
        if rng.random() < ASTRAY and answer.startswith("do"):
            screen = phone.screen
            answer = tap(rng.choice(screen.elements).box, screen.image.size)
        elif answer.startswith("finish"):
            break
        turns.append((prompt(phone, task), answer))
        phone.act(parse(answer))
    return turns


def _another_task(phone: Phone, rng: Random) -> Task:
    """A task on the phone; mostly one for which the open page matters."""
    apps = possible(phone)
    chance, app = rng.random(), phone.path[0] if phone.path else None
    if app is not None and chance < _NEXT[1]:
        kinds = [kind for kind in apps if app in apps[kind]]
        longer = [kind for kind in kinds if kind != "open"]
        kind = rng.choice(longer if longer and chance < _NEXT[0] else kinds)
        filled = phone.focus or "", ""
        typed = [(label, text) for (page, label), text in phone.typed.items() if page == (app,)]
        if typed and rng.random() < 0.7:
            filled = typed[0]
        return make_task(phone, kind, rng, app, filled if rng.random() < 0.6 else ("", ""))
    return make_task(phone, rng.choice(list(apps)), rng)


def ask_steps(phone: Phone, task: Task, count: int, rng: Random) -> list[Sample]:
    """The next step of `task` and of other tasks, from the phone's present state."""
    screen, asked = phone.screen, []
    for chosen in [task, *(_another_task(phone, rng) for _ in range(count - 1))]:
        answer, about = right_action(phone, chosen)
        action = parse(answer)
        assert action is not None, answer
        element = element_at(screen, action.point) if action.point else None
        kind = f"step_{action.name.lower()}"
        box = element.box if element else None
        asked.append(Sample(screen.image, prompt(phone, chosen), answer, kind, box, about))
    return asked


def draw_phone(
    split: str, size: tuple[int, int], scale: int, count: int, rng: Random
) -> tuple[Screen, list[Sample], str]:
    """A page of a phone, `count` questions about the next step, and the text before the picture."""
    phone = Phone(split, f"{rng.getrandbits(64)}", scale, size)
    kinds = [kind for kind in TASK_KINDS if kind in possible(phone)]
    kind = rng.choices(kinds, [_TASK_WEIGHTS[kind] for kind in kinds])[0]
    task = make_task(phone, kind, rng)
    turns = wander(phone, task, rng.randint(0, task.steps), rng)
    asked = ask_steps(phone, task, count, rng)
    return phone.screen, asked, history(turns)


def draw_mixed_batch(
    split: str, rng: Random, packer: Packer, patches: int, questions: int
) -> Batch:
    """A batch of about `patches` 14-pixel patches with `questions` questions a screen."""
    size, scale = rng.choices(list(_SHAPES), list(_SHAPES.values()))[0]
    upright = size[0] < size[1]
    count = max(1, round(patches / (size[0] * size[1] * scale**2 / 196)))
    drawn = []
    for layout in choose_layouts(split, size, count, rng):
        if upright and rng.random() < PHONES:
            drawn.append(draw_phone(split, size, scale, questions, rng))
        else:
            screen = draw(layout, rng, Look(scale=scale))
            drawn.append((screen, ask_many(screen, questions, rng), PREFIX))
    screens, asked, before = zip(*drawn, strict=True)
    return collate(list(screens), list(asked), packer, list(before))
