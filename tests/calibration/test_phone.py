"""The simulated phone: only parsed actions change it, and it looks like what it is."""

import pytest

from calibration.layouts import LAYOUTS, SPLITS
from calibration.phone import DEEPEST, HOME, Action, Phone, element_at, parse, sizes_at
from calibration.phone_tasks import TASK_KINDS, possible, tasks
from calibration.screens import Element
from calibration.tasks import tap

SCALES = (1, 2, 3)


def tapped(phone: Phone, element: Element) -> Phone:
    phone.act(parse(tap(element.box, phone.screen.image.size)))
    return phone


def form_phone() -> Phone:
    """A phone with a form open."""
    phone, task = next(pair for pair in tasks("evaluation", 6) if pair[1].kind == "fill")
    app = next(e for e in phone.screen.elements if e.label == task.path[0])
    return tapped(phone, app)


@pytest.mark.parametrize(
    ("answer", "action"),
    [
        ('do(action="Tap", element=[12,999])', Action("Tap", (12, 999))),
        (' do(action="Tap", element=[0, 7])\n', Action("Tap", (0, 7))),
        ('do(action="Type", text="see you soon")', Action("Type", text="see you soon")),
        ('do(action="Type", text="")', Action("Type")),
        ('do(action="Launch", app="Mail")', Action("Launch", text="Mail")),
        ('do(action="Back")', Action("Back")),
        ('do(action="Home")', Action("Home")),
        ('finish(message="Done")', Action("finish", text="Done")),
    ],
)
def test_actions_are_parsed(answer, action):
    assert parse(answer) == action


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Tap",
        'do(action="Tap", element=[12,1000])',
        'do(action="Tap", element=[-1,5])',
        'do(action="Tap", element=[12])',
        'do(action="Tap", element=[1.5,2])',
        'do(action="Swipe", element=[12,13])',
        'do(action="Tap", element=[12,13]) ',
        'do(action="Back"); do(action="Home")',
        'I think do(action="Back")',
        'do(action="Type", text="a"b")',
        'do(action="Type", text="hello)',
        "finish()",
        'finish(message="Done") do',
    ],
)
def test_anything_else_is_no_action_and_changes_nothing(answer):
    if answer.endswith(" "):
        assert parse(answer) == parse(answer.strip())
        return
    phone = Phone("evaluation", 0)
    before = phone.screen.image.tobytes()
    assert parse(answer) is None
    phone.act(parse(answer))
    assert phone.path == ()
    assert not phone.finished
    assert phone.screen.image.tobytes() == before


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_actions_give_the_same_bytes_and_another_seed_others(split):
    first, second, other = Phone(split, 1), Phone(split, 1), Phone(split, 2)
    assert first.screen.image.tobytes() == second.screen.image.tobytes()
    assert first.screen.image.tobytes() != other.screen.image.tobytes()
    for phone in (first, second):
        tapped(phone, phone.screen.elements[0])
    assert first.path == second.path != ()
    assert first.screen.image.tobytes() == second.screen.image.tobytes()


def test_every_element_of_every_page_can_be_tapped():
    phone = Phone("evaluation", 3)
    for app in phone.screen.elements:
        assert tapped(phone, app).path == (app.label,)
        assert phone.screen.title == phone.title == app.label
        for element in phone.screen.elements:
            tapped(phone, element)
            if element.kind == "field":
                assert phone.focus == element.label
                assert phone.path == (app.label,)
            else:
                assert phone.path == (app.label, element.label)
                phone.act(parse('do(action="Back")'))
        phone.act(parse('do(action="Home")'))
    assert phone.title == HOME


def test_a_tap_between_elements_does_nothing():
    phone = Phone("evaluation", 0)
    assert element_at(phone.screen, (500, 5)) is None
    phone.act(Action("Tap", (500, 5)))
    assert phone.path == ()


def test_back_and_home():
    phone = Phone("evaluation", 0)
    phone.act(parse('do(action="Back")'))
    assert phone.path == ()
    while len(phone.path) < 3:
        tapped(phone, next(e for e in phone.screen.elements if e.kind != "field"))
    path = phone.path
    phone.act(parse('do(action="Back")'))
    assert phone.path == path[:-1]
    phone.act(parse('do(action="Home")'))
    assert phone.path == ()


def test_pages_have_a_deepest_level():
    phone = Phone("evaluation", 0)
    for _ in range(DEEPEST + 2):
        tapped(phone, next(e for e in phone.screen.elements if e.kind != "field"))
    assert len(phone.path) == DEEPEST


def test_launch_opens_apps_that_are_there():
    phone = Phone("evaluation", 0)
    label = phone.screen.elements[-1].label
    phone.act(parse('do(action="Launch", app="Nothing")'))
    assert phone.path == ()
    phone.act(parse(f'do(action="Launch", app="{label}")'))
    assert phone.path == (label,)


def test_typing_changes_the_picture_of_the_focused_field_alone():
    phone = form_phone()
    field = next(e for e in phone.screen.elements if e.kind == "field")
    untouched = phone.screen.image
    phone.act(parse('do(action="Type", text="hello")'))
    assert phone.screen.image.tobytes() == untouched.tobytes()
    assert not phone.typed

    focused = tapped(phone, field).screen.image
    assert focused.tobytes() != untouched.tobytes()
    phone.act(parse('do(action="Type", text="hello")'))
    typed = phone.screen.image
    assert typed.crop(field.box).tobytes() != focused.crop(field.box).tobytes()
    below = (0, field.box[3], *typed.size)
    assert typed.crop(below).tobytes() == untouched.crop(below).tobytes()
    shown = next(e for e in phone.screen.elements if e.label == field.label)
    assert shown.text == "hello"
    assert shown.focused

    phone.act(parse('do(action="Type", text="thanks")'))
    assert phone.typed == {(phone.path, field.label): "thanks"}
    phone.act(parse('do(action="Home")'))
    assert phone.focus is None


def test_what_was_typed_stays_when_the_page_is_left():
    phone = form_phone()
    path = phone.path
    tapped(phone, next(e for e in phone.screen.elements if e.kind == "field"))
    phone.act(parse('do(action="Type", text="rain")'))
    phone.act(parse('do(action="Back")'))
    phone.act(Action("Launch", text=path[0]))
    assert [e.text for e in phone.screen.elements if e.text] == ["rain"]


def test_a_finished_phone_stays_as_it_is():
    phone = Phone("evaluation", 0)
    phone.act(parse('finish(message="Done")'))
    tapped(phone, phone.screen.elements[0])
    assert phone.finished
    assert phone.path == ()


@pytest.mark.parametrize("scale", SCALES)
def test_phones_work_at_every_scale(scale):
    phone = Phone("evaluation", 0, scale)
    width, height = phone.screen.image.size
    assert (width / scale, height / scale) in sizes_at(scale)
    app = phone.screen.elements[0]
    assert tapped(phone, app).path == (app.label,)


def test_a_larger_screen_has_larger_elements_and_text_of_the_same_size():
    small, large = (Phone("evaluation", 0, s, (168, 336)).screen for s in (1, 2))
    assert [e.label for e in small.elements] == [e.label for e in large.elements]
    assert large.elements[0].box == tuple(2 * v for v in small.elements[0].box)
    clock = (0, 0, 56, 14)
    assert small.image.crop(clock).tobytes() == large.image.crop(clock).tobytes()
    assert len(small.image.crop(clock).getcolors()) > 1


def test_each_split_has_layouts_of_its_own():
    for split in SPLITS:
        phone = Phone(split, 0)
        assert phone.screen.layout in LAYOUTS[split]
        assert set(possible(phone)) <= set(TASK_KINDS)
