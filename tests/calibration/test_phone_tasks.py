"""Tasks and episodes: the right actions solve every task, wrong ones do not, the phone decides."""

import json
from random import Random

import pytest

from calibration.episodes import Conversation, run_task, run_tasks
from calibration.layouts import SPLITS
from calibration.phone import Phone, element_at, parse
from calibration.phone_tasks import DONE, TASK_KINDS, Task, possible, prompt, right_action, tasks
from calibration.tasks import tap


def state(phone: Phone, task: Task) -> tuple:
    return phone.screen.image.tobytes(), task


def work(phone: Phone, task: Task) -> int:
    """Takes right actions until the agent has finished; returns their number."""
    steps = 0
    while not phone.finished and steps < task.limit:
        phone.act(parse(right_action(phone, task)[0]))
        steps += 1
    return steps


@pytest.mark.parametrize("split", SPLITS)
def test_the_right_actions_solve_every_task_in_the_fewest_steps(split):
    for phone, task in tasks(split, 36):
        assert work(phone, task) == task.steps <= task.limit
        assert task.solved(phone)


def test_the_right_actions_lead_back_from_anywhere():
    rng = Random(0)
    for phone, task in tasks("evaluation", 24, scales=(1,)):
        for _ in range(4):
            screen = phone.screen
            phone.act(parse(tap(rng.choice(screen.elements).box, screen.image.size)))
            phone.act(parse('do(action="Type", text="wrong")'))
        for _ in range(16):
            phone.act(parse(right_action(phone, task)[0]))
        assert task.solved(phone)


def test_tasks_are_the_same_for_a_seed_and_begin_a_longer_run():
    first = [state(*pair) for pair in tasks("evaluation", 6)]
    assert first == [state(*pair) for pair in tasks("evaluation", 12)][:6]
    assert first != [state(*pair) for pair in tasks("evaluation", 6, seed=1)]
    assert {task.kind for _, task in tasks("evaluation", 6)} == set(TASK_KINDS)


def test_an_unknown_split_has_no_tasks():
    with pytest.raises(KeyError):
        next(tasks("test", 1))


def test_a_task_is_possible_on_its_phone():
    for phone, task in tasks("evaluation", 12):
        assert task.path[0] in possible(phone)[task.kind]


def test_saying_done_at_once_does_not_succeed():
    for phone, task in tasks("evaluation", 12):
        assert not run_task(lambda messages: DONE, phone, task).solved


def test_reaching_the_goal_without_saying_so_does_not_succeed():
    for phone, task in tasks("evaluation", 12):
        while right_action(phone, task)[0] != DONE:
            phone.act(parse(right_action(phone, task)[0]))
        assert task.reached(phone)
        assert not task.solved(phone)


def test_one_wrong_tap_and_done_does_not_succeed():
    for phone, task in tasks("evaluation", 12):
        right = parse(right_action(phone, task)[0])
        wanted = element_at(phone.screen, right.point)
        screen = phone.screen
        other = next(e for e in screen.elements if e.label != wanted.label)
        phone.act(parse(tap(other.box, screen.image.size)))
        phone.act(parse(DONE))
        assert phone.finished
        assert not task.solved(phone)


def test_another_word_in_the_field_does_not_succeed():
    phone, task = next(pair for pair in tasks("evaluation", 6) if pair[1].kind == "submit")
    answers = []

    def ask(messages):
        answer = right_action(phone, task)[0].replace(task.text, "wrong")
        answers.append(answer)
        return answer

    episode = run_task(ask, phone, task)
    assert not episode.solved
    assert len(episode.answers) == task.limit
    assert task.text
    assert not any(task.text in answer for answer in answers)


def test_an_agent_that_babbles_uses_up_its_steps():
    phone, task = next(tasks("evaluation", 1))
    episode = run_task(lambda messages: "hm", phone, task)
    assert len(episode.answers) == len(episode.seconds) == task.limit
    assert not episode.solved
    assert phone.path == ()


def test_episodes_of_the_right_actions_are_solved():
    chosen = list(tasks("evaluation", 6))
    at = iter(chosen)
    current = []

    def ask(messages):
        if len(messages) == 2:
            current[:] = next(at)
        return right_action(*current)[0]

    episodes = list(run_tasks(ask, chosen))
    assert [e.task for e in episodes] == [task for _, task in chosen]
    assert all(e.solved and len(e.answers) == e.task.steps for e in episodes)


def test_only_the_last_turn_of_a_conversation_has_a_picture():
    phone, task = next(tasks("evaluation", 1))
    conversation = Conversation(phone, task)
    answer = right_action(phone, task)[0]
    first = json.loads(json.dumps(conversation.ask()))
    assert [part["type"] for part in first[1]["content"]] == ["image_url", "text"]
    text = prompt(phone, task)
    conversation.answered(answer)
    phone.act(parse(answer))
    messages = conversation.ask()
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[1]["content"] == [{"type": "text", "text": text}]
    assert messages[2]["content"] == answer
    assert messages[3]["content"][1]["text"] == prompt(phone, task) != text
    assert str(messages).count("data:image/png;base64,") == 1
