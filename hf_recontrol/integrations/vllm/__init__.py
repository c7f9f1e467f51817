"""
A controlled model on vLLM (`pip install 'hf_recontrol[vllm]'`). Imports nothing of vLLM until it is used.

vLLM loads the base as it is (the architecture's own class, its weights, its compiled graph). What is ours, and which
arguments name it:

- `arguments.py` is the user's way in: [`recontrol_engine_args`], [`serve_vllm`];
- `processor.py` (`logits_processors`) is told by vLLM which request stands in which row, and refuses bad requests. As
  vLLM imports it, it makes the load format known: a vLLM that serves plain models runs nothing of ours;
- `loader.py` (`load_format`) loads the base and puts control on it, or says why that cannot be;
- `layer.py` edits the states that reach vLLM's layer from states to logits;
- `batch.py` knows which of its rows follow which settings;
- `served.py` holds the heads and reads what requests ask for;
- `middleware.py` (`middleware`) carries a request's model and fields to where requests are read, on the HTTP server.
"""
