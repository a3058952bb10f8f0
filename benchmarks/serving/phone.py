"""The agent's whole loop on the simulated phone, served in FP32 and in INT8."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from server import served

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def measure(engines: dict[str, Path], tasks: int) -> dict[str, Any]:
    """engines: by precision. The tasks of evaluation layouts, the same for all."""
    import phone_agent

    from calibration.episodes import run_tasks
    from calibration.phone_tasks import SYSTEM
    from calibration.phone_tasks import tasks as draw_tasks

    result: dict[str, Any] = {}
    for precision, engine in engines.items():
        with served(engine) as server:
            ask, _ = phone_agent.ask_server(f"{server.url}/v1", None, "none")
            drawn = draw_tasks("evaluation", tasks, seed=0)
            result[precision] = phone_agent.summarise(list(run_tasks(ask, drawn, SYSTEM)))
    return result
