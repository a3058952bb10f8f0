"""Load on a server that speaks OpenAI's protocol: requests on a clock, and what they waited for.

`runner.run` measures, `report` and `plotting` show. The definitions are those of `vllm bench serve`
and GuideLLM, so that figures compare; docs/load.md states them.
"""
