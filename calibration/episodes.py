"""An agent at work: a task's conversation in OpenAI's form, and the loop of screenshot and action.

The conversation has the form of Open-AutoGLM's: a system prompt, then in turn a screenshot with a
text, and an action; a screenshot leaves the conversation when it has been answered. Whether a task
is solved is decided by the state of the phone.
"""

import base64
import io
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from calibration.phone import Phone, parse
from calibration.phone_tasks import SYSTEM, Task, prompt

Messages = list[dict[str, Any]]


def screenshot(phone: Phone) -> str:
    """The open page as a PNG in a data URL."""
    file = io.BytesIO()
    phone.screen.image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class Conversation:
    """The messages of one task."""

    def __init__(self, phone: Phone, task: Task, system: str = SYSTEM):
        self.phone, self.task = phone, task
        self.messages: Messages = [{"role": "system", "content": system}]

    def ask(self) -> Messages:
        """The messages that ask for the next action, the present screenshot in the last."""
        content = [
            {"type": "image_url", "image_url": {"url": screenshot(self.phone)}},
            {"type": "text", "text": prompt(self.phone, self.task)},
        ]
        self.messages.append({"role": "user", "content": content})
        return self.messages

    def answered(self, answer: str) -> None:
        """Takes the screenshot out of the last turn and appends the answer."""
        self.messages[-1]["content"] = self.messages[-1]["content"][1:]
        self.messages.append({"role": "assistant", "content": answer})


@dataclass(frozen=True)
class Episode:
    """What became of one task. solved: the phone's state says so; seconds: of each answer."""

    task: Task
    solved: bool
    answers: tuple[str, ...]
    seconds: tuple[float, ...]


def run_task(
    ask: Callable[[Messages], str], phone: Phone, task: Task, system: str = SYSTEM
) -> Episode:
    """Has an agent work on the task until it calls it finished or has no actions left.

    ask: gives the agent's answer to messages; what it raises ends the task and is passed on.
    """
    conversation = Conversation(phone, task, system)
    answers: list[str] = []
    seconds: list[float] = []
    while not phone.finished and len(answers) < task.limit:
        messages = conversation.ask()
        begun = time.perf_counter()
        answers.append(ask(messages))
        seconds.append(time.perf_counter() - begun)
        conversation.answered(answers[-1])
        phone.act(parse(answers[-1]))
    return Episode(task, task.solved(phone), tuple(answers), tuple(seconds))


def run_tasks(
    ask: Callable[[Messages], str], tasks: Iterable[tuple[Phone, Task]], system: str = SYSTEM
) -> Iterator[Episode]:
    """Yields what became of each of `tasks` (phone_tasks.tasks), one after the other."""
    for phone, task in tasks:
        yield run_task(ask, phone, task, system)
