"""Chat templates that write as those of well-known models do, and the tokens that belong to them.

Written anew from the formats: what they do to a chat is theirs, how they do it is not. The end of a text is written
``</s>`` and its beginning ``<s>``, as the tokenizer of the tests has them. A line break after a block is none to
Jinja, as transformers sets it up.
"""

GENERATE = "{% if add_generation_prompt %}"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    + GENERATE
    + "<|im_start|>assistant\n{% endif %}"
)

SMOLLM2 = (  # a system message of its own
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}" + CHATML
)

ALTERNATE = (
    "{% for m in chat %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant') }}{% endif %}{% endfor %}"
)

LLAMA2 = (  # the system message stands in the first of the user's; nothing asks for a response
    "{% if messages[0]['role'] == 'system' %}{% set chat = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set chat = messages %}{% endif %}"
    + ALTERNATE
    + "{% for m in chat %}{% if m['role'] == 'user' %}<s>[INST] "
    "{% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}"
)

LLAMA3 = (  # tools in the first message of the user; one call at most, written as JSON
    "<s>{% if messages[0]['role'] == 'system' %}{% set chat = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set chat = messages %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\n{% if tools %}Environment: ipython\n{% endif %}"
    "Today Date: {{ strftime_now('%d %b %Y') }}\n\n{{ system | trim }}<|eot_id|>"
    "{% for m in chat %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>'
    "{% elif m['role'] == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m['content'] | tojson }}<|eot_id|>"
    "{% else %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% if tools and loop.first %}Given these functions:\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{{ m['content'] | trim }}<|eot_id|>{% endif %}{% endfor %}"
    + GENERATE
    + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

MISTRAL = (  # version 3: the tools stand before the last message of the user
    "{% if messages[0]['role'] == 'system' %}{% set chat = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set chat = messages %}{% endif %}"
    "{% set last = chat | map(attribute='role') | list | join(' ') %}"
    "{% set ns = namespace(last=0) %}{% for m in chat %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}<s>"
    "{% for m in chat %}{% if m['role'] == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {% if system and loop.index0 == ns.last %}{{ system }}\n\n{% endif %}{{ m['content'] }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}'
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('Tool call IDs have length 9!') }}{% endif %}"
    ', "id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]</s>'
    "{% elif m['role'] == 'tool' %}[TOOL_RESULTS] "
    '{"content": {{ m["content"] | tojson }}, "call_id": "{{ m["tool_call_id"] }}"}[/TOOL_RESULTS]'
    "{% else %} {{ m['content'] | trim }}</s>{% endif %}{% endfor %}"
)

QWEN_TOOLS = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n\n{% endif %}# Tools\n<tools>"
    "{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}{{ '\n' }}</tools><|im_end|>\n"
    "{% elif messages[0]['role'] == 'system' %}<|im_start|>system\n{{ messages[0]['content'] }}<|im_end|>\n"
)
QWEN_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\n' if not loop.first or m['content'] }}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
    "{{ c.function.arguments | tojson }}{% endif %}}\n</tool_call>{% endfor %}<|im_end|>\n"
)
QWEN_RESULTS = (  # results stand in one turn of the user
    "{% elif m['role'] == 'tool' %}{% if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}"
    "<|im_start|>user{% endif %}{{ '\n' }}<tool_response>\n{{ m['content'] }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}<|im_end|>\n{% endif %}{% endif %}{% endfor %}"
)

QWEN25 = (
    QWEN_TOOLS + "{% else %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' or (m['role'] == 'system' and not loop.first) %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% elif m['role'] == 'assistant' %}<|im_start|>assistant\n{{ m['content'] or '' }}"
    + QWEN_CALLS
    + QWEN_RESULTS
    + GENERATE
    + "<|im_start|>assistant\n{% endif %}"
)

QWEN3 = (  # no thoughts before the last question, a block for them, be it empty, after it
    QWEN_TOOLS + "{% endif %}{% set ns = namespace(question=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' or (m['role'] == 'system' and not loop.first) %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% elif m['role'] == 'assistant' %}{% set content = m['content'] %}{% set thought = '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.question and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ content.lstrip('\n') }}{% else %}{{ content }}{% endif %}"
    + QWEN_CALLS
    + QWEN_RESULTS
    + GENERATE
    + "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

PHI3 = (  # the end of text after the last turn
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    + GENERATE
    + "<|assistant|>\n{% else %}</s>{% endif %}"
)

GEMMA = (  # the assistant is a model, and the system message stands in the first of the user's
    "<s>{% if messages[0]['role'] == 'system' %}{% set chat = messages[1:] %}"
    "{% set system = messages[0]['content'] + '\n\n' %}{% else %}{% set chat = messages %}{% set system = '' %}"
    "{% endif %}"
    + ALTERNATE
    + "{% for m in chat %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% if loop.first %}{{ system }}{% endif %}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    + GENERATE
    + "<start_of_turn>model\n{% endif %}"
)

DEEPSEEK_R1 = (  # no thoughts in any turn, yet the generation prompt begins one; arguments must be text
    "<s>{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' and m.tool_calls %}<|Assistant|><|calls|>{% for c in m.tool_calls %}"
    "{{ '<|call|>function<|sep|>' + c.function.name + '\n```json\n' + c.function.arguments + '\n```<|/call|>' }}"
    "{% endfor %}<|/calls|></s>"
    "{% elif m['role'] == 'assistant' %}{% if messages[loop.index0 - 1]['role'] != 'tool' %}<|Assistant|>{% endif %}"
    "{{ m['content'].split('</think>')[-1] }}</s>"
    "{% elif m['role'] == 'tool' %}<|output|>{{ m['content'] }}<|/output|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'tool' %}<|Assistant|><think>\n{% endif %}"
)

SMOLLM3 = (  # marks what the assistant says itself
    "<|im_start|>system\nReasoning Mode: {{ '/no_think' if enable_thinking is false else '/think' }}<|im_end|>\n"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{% if enable_thinking is false %}<think>\n\n</think>\n{% endif %}"
    "{{ m['content'].lstrip('\n') }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% elif m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    + GENERATE
    + "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n{% endif %}{% endif %}"
)

ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n"
    "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}"
)

COMMAND_R = (
    "<s>{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "<|{{ {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'}[m['role']] }}_TOKEN|>"
    "{{ m['content'].strip() }}<|END_OF_TURN_TOKEN|>{% endfor %}"
    + GENERATE
    + "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)

GPT_OSS = (  # thoughts in the last turn only, which ends in a token of its own; its developer is no system
    "{% for m in messages %}{% if m['role'] == 'developer' or m['role'] == 'system' %}"
    "<|start|>developer<|message|># Instructions\n{{ m['content'] }}<|end|>"
    "{% elif m['role'] == 'assistant' %}<|start|>assistant{% if m.thinking and loop.last %}"
    "<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
    "<|channel|>final<|message|>{{ m['content'] }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    + GENERATE
    + "<|start|>assistant{% endif %}"
)

GPT_OSS_TOOLS = (  # no thoughts beside a call that an answer follows; the result begins with the name of its function
    GPT_OSS.replace(
        "{% elif m['role'] == 'assistant' %}",
        "{% elif m.tool_calls %}{% set call = m.tool_calls[0].function %}{% if loop.last %}"
        "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
        "<|start|>assistant to=functions.{{ call.name }}<|message|>"
        "{{ call.arguments | tojson }}<|call|>{% elif m['role'] == 'tool' %}"
        "<|start|>functions.{{ messages[loop.index0 - 1].tool_calls[0].function.name }} to=assistant<|message|>"
        "{{ m['content'] | tojson }}<|end|>{% elif m['role'] == 'assistant' %}",
    )
)

TOKENS = (
    "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<think>",
    "</think>", "<tool_call>", "</tool_call>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<start_of_turn>",
    "<end_of_turn>", "<|User|>", "<|Assistant|>", "<|calls|>", "<|/calls|>", "<|call|>", "<|/call|>", "<|sep|>",
    "<|output|>", "<|/output|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>",
)  # fmt: skip
