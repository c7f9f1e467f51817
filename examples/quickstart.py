"""
Answer under control, with the head that `make demo` trained.

    python examples/quickstart.py

Everything here works the same with a head and a base from the Hub.
"""

import sys

from transformers import AutoTokenizer

from hf_recontrol import ControlConfig, ReControlForCausalLM

head = sys.argv[1] if len(sys.argv) > 1 else "demo/head"
model = ReControlForCausalLM.from_pretrained(head)  # the head knows its base model
tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)

chat = [{"role": "user", "content": "My neighbour's dog barks all night. What should I write to him?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
length = inputs["input_ids"].shape[1]

for name, control in {
    "base": False,
    "recommended": None,  # model.control, here the advantage edit
    "ascent": ControlConfig(method="ascent", step_size=0.5, num_steps=30),
    "guarded": ControlConfig(method="advantage", step_size=2 * model.control.step_size, plausibility=0.1),
}.items():
    output = model.generate(**inputs, control=control, max_new_tokens=48, do_sample=False)
    print(f"--- {name}\n{tokenizer.decode(output[0, length:], skip_special_tokens=True)}")

values = model.values(**inputs)
print(f"--- expected reward of an uncontrolled answer: {values[0, -1, 0].item():.2f}")
