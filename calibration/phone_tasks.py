"""Tasks for an agent on the simulated phone: their goals, and the right action at any time."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from calibration.phone import Phone
from calibration.tasks import tap
from calibration.words import TYPED

SYSTEM = (
    'Answer with one action: do(action="Tap", element=[x,y]), do(action="Type", text="hello"), '
    'do(action="Back") or finish(message="Done").'
)
DONE = 'finish(message="Done")'
TASK_KINDS = ("open", "select", "press", "confirm", "fill", "submit")
_PAGES = {"select": "list", "confirm": "list", "press": "dialog", "fill": "form", "submit": "form"}
SCALES = (1, 1, 2, 3)


@dataclass(frozen=True)
class Task:
    """Something to do. kind: one of TASK_KINDS. path: what has to be open at the end.

    field, text: what has to stand in which field of the page at path[:1], or None and "".
    steps: how many actions the shortest way takes, `finish` included.
    """

    kind: str
    instruction: str
    path: tuple[str, ...]
    field: str | None = None
    text: str = ""

    @property
    def steps(self) -> int:
        return len(self.path) + (2 if self.field else 0) + 1

    @property
    def limit(self) -> int:
        """The number of actions after which the task has failed."""
        return 2 * self.steps + 2

    def filled(self, phone: Phone) -> bool:
        return self.field is None or phone.typed.get((self.path[:1], self.field)) == self.text

    def reached(self, phone: Phone) -> bool:
        """Whether the phone is where it should be, whoever says so."""
        return phone.path == self.path and self.filled(phone)

    def solved(self, phone: Phone) -> bool:
        """Whether the goal is reached and the agent has said so."""
        return phone.finished and self.reached(phone)


def possible(phone: Phone) -> dict[str, list[str]]:
    """The kinds of tasks that this phone allows, each with the apps to begin it with."""
    apps: dict[str, list[str]] = {"open": [e.label for e in phone.page(()).elements]}
    for app in apps["open"]:
        family = phone.family((app,))
        for kind, wanted in _PAGES.items():
            if family == wanted or (kind == "press" and family == "form"):
                apps.setdefault(kind, []).append(app)
    return apps


def make_task(
    phone: Phone, kind: str, rng: Random, app: str | None = None, filled: tuple[str, str] = ("", "")
) -> Task:
    """A task of `kind` on `phone`, in `app` or in one of those that allow it.

    filled: a field and its text, where empty ones are chosen by chance.
    Raises KeyError when the phone has no app for this kind.
    """
    app = app or rng.choice(possible(phone)[kind])
    path: tuple[str, ...] = (app,)
    said = [rng.choice(("Open {}.", "Tap the {} app.")).format(app)]
    field, text = None, ""

    def labels(wanted: str) -> list[str]:
        return [e.label for e in phone.page(path).elements if e.kind == wanted]

    if kind in ("fill", "submit"):
        field = filled[0] or rng.choice(labels("field"))
        text = filled[1] or rng.choice(TYPED)
        said += [f"Tap the {field} field.", f"Type {text}."]
    if kind in ("select", "confirm"):
        path = (app, rng.choice(labels("row")))
        said.append(f"Select {path[-1]}.")
    if kind in ("press", "confirm", "submit"):
        path = (*path, rng.choice(labels("button")))
        said.append(rng.choice(("Press {}.", "Tap the {} button.")).format(path[-1]))
    return Task(kind, " ".join(said), path, field, text)


def right_action(phone: Phone, task: Task) -> tuple[str, str | None]:
    """The action that leads on from any state of the phone, and the label it is about."""
    depth = len(phone.path)
    here = phone.path == task.path[:depth]
    form = depth == 1 or task.field is None or task.filled(phone)
    if not here or (depth and not form):
        return 'do(action="Back")', None
    if depth == 1 and task.field is not None and not task.filled(phone):
        if phone.focus == task.field:
            return f'do(action="Type", text="{task.text}")', task.field
        wanted = task.field
    elif depth == len(task.path):
        return DONE, task.path[-1]
    else:
        wanted = task.path[depth]
    screen = phone.screen
    element = next(e for e in screen.elements if e.label == wanted)
    return tap(element.box, screen.image.size), wanted


def prompt(phone: Phone, task: Task) -> str:
    """The text beside a screenshot: what is open, what is to be done."""
    return f"{phone.title} is open. {task.instruction}"


def tasks(
    split: str, count: int, seed: int = 0, scales: tuple[int, ...] = SCALES
) -> Iterator[tuple[Phone, Task]]:
    """Yields `count` phones at their home screens with a task each, the kinds in turn.

    The same split, seed and scales give the same ones, and a longer run begins with a shorter one.
    Raises KeyError for an unknown split.
    """
    for index in range(count):
        kind = TASK_KINDS[index % len(TASK_KINDS)]
        for attempt in range(100):
            name = f"{seed}/{index}/{attempt}"
            rng = Random(f"task/{split}/{name}")
            phone = Phone(split, name, rng.choice(scales))
            if kind in possible(phone):
                yield phone, make_task(phone, kind, rng)
                break
        else:
            raise ValueError(f"split {split!r} has no phone for tasks of kind {kind!r}")
