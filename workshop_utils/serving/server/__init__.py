"""A server with the routes of NIM and the API of OpenAI, for learning and testing; production is
NIM or vLLM.

from workshop_utils.serving.server import start

with start("models/huggingface/smollm2-135m-instruct", "runs/store") as server:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
"""

from workshop_utils.serving.server.server import Handle, start

__all__ = ["Handle", "start"]
