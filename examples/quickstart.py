"""
Answer under control, with the head that `make demo` trained.

    python examples/quickstart.py [demo/head]

Everything here works the same with a head and a base from the Hub. The base must have a chat template.
"""

import sys
from dataclasses import replace

from transformers import AutoTokenizer, set_seed

from hf_recontrol import ReControlForCausalLM

# The folder that `make demo` makes, from the repository's root.
head = sys.argv[1] if len(sys.argv) > 1 else "demo/head"
model = ReControlForCausalLM.from_pretrained(head)  # the head knows its base model
tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)

chat = [{"role": "user", "content": "My neighbour's dog barks all night. What should I write to him?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
length = inputs["input_ids"].shape[1]

strong = replace(model.control, step_size=3 * model.control.step_size)
for name, control in {
    "base": False,
    f"recommended ({model.control.method})": None,  # model.control
    "three times as strong": strong,
    "the same, guarded": replace(strong, plausibility=0.1),
}.items():
    set_seed(0)
    # The step size that a head recommends is measured at the temperature that it was trained at.
    sampled = {"max_new_tokens": 48, "do_sample": True, "temperature": 0.9, "top_k": 0}
    output = model.generate(**inputs, **sampled, control=control)
    print(f"--- {name}\n{tokenizer.decode(output[0, length:], skip_special_tokens=True)}")

values = model.values(**inputs)
print(f"--- expected reward of an uncontrolled answer: {values[0, -1, 0].item():.2f}")
