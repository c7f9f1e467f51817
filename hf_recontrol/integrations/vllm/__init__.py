"""
A controlled model on vLLM (`pip install 'hf_recontrol[vllm]'`). Imports nothing of vLLM until it is used.

vLLM loads the base as it is (the architecture's own class, its weights, its compiled graph). What is ours:

- `plugin.py` registers the load format `recontrol` with any vLLM that starts, and does nothing else;
- `loader.py` loads the base, then puts control on it (`layer.py`), or says why that cannot be;
- `layer.py` edits the states that reach vLLM's layer from states to logits;
- `batch.py` knows which of its rows follow which settings;
- `processor.py` is told by vLLM which request stands in which row, and refuses bad requests;
- `served.py` holds the heads and reads what requests ask for;
- `middleware.py` carries a request's model and fields to where requests are read, on the HTTP server;
- `arguments.py` is the user's way in: [`recontrol_engine_args`], [`serve_vllm`].
"""
