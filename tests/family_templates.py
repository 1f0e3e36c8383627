# ruff: noqa: E501
"""Small chat templates of our own, each with the role markers and the constructs of one family's."""

from __future__ import annotations

TEMPLATES: dict[str, str] = {
    "chatml": """{%- for m in messages -%}
    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""",
    "smollm2": """{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}
{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llama2": """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}
{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% else %}{% set rest = messages %}{% set system = false %}{% endif %}
{% for m in rest %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{% if loop.index0 == 0 and system != false %}{% set text = system + m['content'] %}
{% else %}{% set text = m['content'] %}{% endif %}
{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{% elif m['role'] == 'assistant' %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}""",
    "llama3": """{%- set system = '' -%}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}
    {%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{%- endif %}
{%- if tools is not defined or not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + 'Today: ' + date_string + '\\n\\n' + system }}
{%- if builtin_tools is defined and tools is not none %}
    {{- 'Tools: ' + builtin_tools | reject('equalto', 'code_interpreter') | join(', ') + '\\n' }}
{%- endif %}
{{- '<|eot_id|>' }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
    {%- else %}{{- raise_exception('No first user message') }}{%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}
    {{- first + '<|eot_id|>' }}
{%- endif %}
{%- for m in messages %}
    {%- if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) %}
        {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in m %}
        {%- if not m.tool_calls|length == 1 %}{{- raise_exception('One tool call at once') }}{%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- '}' }}{{- '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if m.content is mapping or m.content is iterable %}{{- m.content | tojson }}
        {%- else %}{{- m.content }}{%- endif %}{{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    "smollm3": """{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- set mode = '/think' if enable_thinking else '/no_think' -%}
{%- if messages[0].role == 'system' -%}
    {%- set system = messages[0].content -%}
    {%- if '/no_think' in system -%}{%- set mode = '/no_think' -%}
    {%- elif '/think' in system -%}{%- set mode = '/think' -%}{%- endif -%}
    {%- set custom = system.replace('/no_think', '').replace('/think', '').rstrip() -%}
{%- endif -%}
{{- '<|im_start|>system\\nDate: ' ~ strftime_now('%B %Y') ~ '\\nMode: ' ~ mode ~ '\\n\\n' -}}
{{- custom or 'You help.' -}}{{- '\\n' -}}
{%- if xml_tools or python_tools -%}
    {%- set ns = namespace(text='<tools>\\n') -%}
    {%- for tool in xml_tools -%}
        {%- set ns.text = ns.text ~ (tool | string) ~ '\\n' -%}
    {%- endfor -%}
    {{- ns.text ~ '</tools>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for m in messages -%}
    {%- set content = m.content if m.content is string else '' -%}
    {%- if m.role == 'user' -%}{{ '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' -%}
        {% generation %}
        {%- if mode == '/think' -%}{{ '<|im_start|>assistant\\n' + content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- else -%}
        {{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' + content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endif -%}
        {% set mode = 'seen' %}
        {% endgeneration %}{{ mode }}
    {%- elif m.role == 'tool' -%}{{ '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|im_start|>assistant\\n' }}{%- if mode == '/no_think' -%}{{ '<think>\\n\\n</think>\\n' }}{%- endif -%}
{%- endif -%}
""",
    "mistral": """{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace() %}{%- set ns.index = 0 %}
{%- for m in loop_messages %}
    {%- if not (m.role == 'tool' or m.role == 'tool_results' or (m.tool_calls is defined and m.tool_calls)) %}
        {%- if (m['role'] == 'user') != (ns.index % 2 == 0) %}
            {{- raise_exception('After the optional system message, roles must alternate') }}
        {%- endif %}{%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for m in loop_messages %}
    {%- if m['role'] == 'user' %}
        {%- if tools is not none and (m == user_messages[-1]) %}
            {{- '[AVAILABLE_TOOLS][' }}
            {%- for tool in tools %}{%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != 'return' %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ', ' }}{%- endif %}
                {%- endfor %}{{- '}}' }}
                {%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']' }}{%- endif %}
            {%- endfor %}{{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if loop.last and system is defined %}{{- '[INST]' + system + '\\n\\n' + m['content'] + '[/INST]' }}
        {%- else %}{{- '[INST]' + m['content'] + '[/INST]' }}{%- endif %}
    {%- elif m.tool_calls is defined and m.tool_calls is not none %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in m.tool_calls %}{%- set out = call.function|tojson %}{{- out[:-1] }}
            {%- if not call.id is defined or call.id|length != 9 %}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
            {%- endif %}{{- ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']' + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif m['role'] == 'assistant' %}{{- m['content'] + eos_token}}
    {%- elif m['role'] == 'tool_results' or m['role'] == 'tool' %}
        {%- if m.content is defined and m.content.content is defined %}{%- set content = m.content.content %}
        {%- else %}{%- set content = m.content %}{%- endif %}
        {{- '[TOOL_RESULTS]{"content": ' + content|string + ', "call_id": "' + m.tool_call_id + '"}' }}
    {%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}
{%- endfor %}
""",
    "tekken": """{%- macro parts(content) -%}
    {%- if content is string %}{{- content }}{%- else %}
        {%- for part in content %}
            {%- if part['type'] == 'text' %}{{- part['text'] | trim }}
            {%- else %}{{- raise_exception('No such part') }}{%- endif %}
        {%- endfor %}{%- endif %}
{%- endmacro -%}
{{- bos_token }}{%- set default = 'Date ' + strftime_now('%Y-%m-%d') -%}
{%- if messages[0]['role'] == 'system' %}{{- '[SYSTEM_PROMPT]' + parts(messages[0].content) + '[/SYSTEM_PROMPT]' }}
{%- else %}{{- '[SYSTEM_PROMPT]' + default + '[/SYSTEM_PROMPT]' }}{%- endif %}
{%- for m in messages[1:] if m.role == 'user' or m.role == 'assistant' %}
    {%- if m.role == 'user' %}{{- '[INST]' + parts(m.content) + '[/INST]' }}
    {%- else %}{{- parts(m.content) + eos_token }}{%- endif %}
{%- endfor %}
""",
    "qwen2": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}{{- 'You are Q.' }}{%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools>\\n{\\"name\\": <name>}<|im_end|>\\n" }}
{%- endif %}
{%- for m in messages %}
    {%- if (m.role == "user") or (m.role == "system" and not (loop.first and tools)) or (m.role == "assistant" and not m.tool_calls) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
    {%- elif m.role == "assistant" %}
        {{- '<|im_start|>' + m.role }}{%- if m.content %}{{- '\\n' + m.content }}{%- endif %}
        {%- for call in m.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
            {{- call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}{{- '<|im_end|>\\n' }}
    {%- elif m.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- m.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    "qwen3": """{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for m in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and m.role == "user" and m.content is string and not(m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.content is string %}{%- set content = m.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if m.role != "assistant" %}{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- else %}
        {%- set reasoning = '' %}
        {%- if m.reasoning_content is string %}{%- set reasoning = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or (not loop.last and reasoning)) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<tool_call>' }}{%- set args = call.function.arguments %}
            {%- if args is string %}{{- args }}{%- else %}{{- args | tojson }}{%- endif %}{{- '</tool_call>' }}
        {%- endfor %}{{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
""",
    "gemma2": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{% if (m['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}""",
    "gemma3": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}{%- set prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}
    {%- set rest = messages[1:] -%}
{%- else -%}{%- set prefix = "" -%}{%- set rest = messages -%}{%- endif -%}
{%- for m in rest -%}
    {{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + (prefix if loop.first else "") }}
    {%- if m['content'] is string -%}{{ m['content'] | trim }}
    {%- elif m['content'] is iterable -%}
        {%- for item in m['content'] -%}{%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
""",
    "phi3": """{% for m in messages %}{% if m['role'] == 'system' and m['content'] %}{{'<|system|>\n' + m['content'] + '<|end|>\n'}}
{% elif m['role'] == 'user' %}{{'<|user|>\n' + m['content'] + '<|end|>\n'}}
{% elif m['role'] == 'assistant' %}{{'<|assistant|>\n' + m['content'] + '<|end|>\n'}}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "phi4-mini": """{% for m in messages %}{% if m['role'] == 'system' and 'tools' in m and m['tools'] is not none %}
{{ '<|' + m['role'] + '|>' + m['content'] + '<|tool|>' + m['tools'] + '<|/tool|>' + '<|end|>' }}
{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}""",
    "granite": """{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system = "Today's Date: " + strftime_now('%B %d, %Y') + "." %}
    {%- if tools and documents %}{%- set system = system + " Use tools and documents." %}
    {%- elif thinking %}{%- set system = system + " Think <think></think>." %}{%- endif %}
    {%- if controls and 'citations' in controls and documents %}{%- set system = system + ' Cite.' %}{%- endif %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\\n' }}
{%- if tools %}{{- '<|start_of_role|>available_tools<|end_of_role|>' + tools | tojson(indent=4) + '<|end_of_text|>\\n' }}{%- endif %}
{%- if documents %}
    {%- for d in documents %}
        {{- '<|start_of_role|>document {"document_id": "' + (d['doc_id'] | default(loop.index)) | string + '"}<|end_of_role|>\\n' }}
        {{- d['text'] }}{{- '<|end_of_text|>\\n' }}
    {%- endfor %}
{%- endif %}
{%- for m in loop_messages %}
    {{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + (m['content'] or '') + '<|end_of_text|>\\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant' }}{%- if controls %}{{- ' ' + controls | tojson()}}{%- endif %}{{- '<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}
""",
    "olmo2": """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ '<|system|>\\n' + m['content'] + '\\n' }}
{% elif m['role'] == 'user' %}{{ '<|user|>\\n' + m['content'] + '\\n' }}
{% elif m['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\\n' + m['content'] + eos_token + '\\n' }}
{% else %}{{ '<|assistant|>\\n' + m['content'] + eos_token }}{% endif %}{% endif %}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}""",
    "stablelm2": """{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'].strip() + eos_token }}
{% elif m['role'] == 'assistant' %}{% generation %}{{ '<|assistant|>\n' + m['content'] + eos_token }}{% endgeneration %}
{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' + '\n' }}{% endif %}
{{ '\n' }}{% endfor %}""",
    "command-r": """{{ bos_token }}
{%- macro json_type(type) -%}
    {%- if type is string -%}{{ {'string': 'str', 'integer': 'int', 'array': 'List'}.get(type, type) }}
    {%- else -%}{{ type | join('|') }}{%- endif -%}
{%- endmacro -%}
{%- macro signature(tool) -%}
    def {{ tool.function.name }}({% for name, field in tool.function.parameters.properties|dictsort -%}
    {{ name }}: {% if not name in (tool.function.parameters.required or []) %}Optional[{{ json_type(field.type) }}] = None
    {%- else %}{{ json_type(field.type) }}{% endif %}{% if not loop.last %}, {% endif %}{% endfor %}) -> Dict
{%- endmacro -%}
{%- set ns = namespace(system='') -%}
{%- for m in messages if m.role == 'system' -%}{%- set ns.system = ns.system ~ m.content -%}{%- endfor -%}
<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{ ns.system }}
{%- if tools %}{{ '\\n\\n' }}{% for tool in tools %}{{ signature(tool) }}{{ '\\n' }}{% endfor %}{% endif %}
{%- if documents %}<results>{% for d in documents %}
Document: {{ loop.index0 }}
{% for key, value in d.items() %}{{ key }}: {{ value }}
{% endfor %}{% endfor %}</results>{% endif %}<|END_OF_TURN_TOKEN|>
{%- for m in messages if m.role != 'system' %}
    {%- if m.tool_calls %}{{ '<|CHATBOT_TOKEN|>Action:' }}{% for call in m.tool_calls %}
{"tool_name": "{{ call.function.name }}", "parameters": {{ call.function.arguments|tojson(indent=2, sort_keys=true) }}}{% endfor %}
    {%- else %}{{ '<|START_OF_TURN_TOKEN|><|' ~ {'assistant': 'CHATBOT'}.get(m.role, m.role|upper) ~ '_TOKEN|>' ~ m.content.strip() ~ '<|END_OF_TURN_TOKEN|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}""",
    "command-r7b": """{{ bos_token }}{%- macro place_of(id) %}
{%- set ns = namespace(place=0, found=false) %}
{%- for m in messages if m.tool_calls %}{%- for call in m.tool_calls %}
    {%- if call.id == id and not ns.found -%}{{ ns.place }}{%- set ns.found = true %}{%- endif %}
    {%- set ns.place = ns.place + 1 %}
{%- endfor %}{%- endfor %}
{%- endmacro %}
{%- macro result(m) -%}
{# what a tool gave #}
{"tool_call_id": "{{ place_of(m.tool_call_id) }}", "results": {"0": {{ m.content|tojson }}}}
{%- endmacro -%}
{%- set first = messages[0]['role']|lower == 'system' %}{%- set ns = namespace(calls=0, told=[]) %}
<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|># Rules
{% for tool in tools or [] %}

{{ loop.index }}. {{ tool['function']['name'] }}: {{ tool['function']['parameters']|tojson }}{%- if not loop.last %};{% endif %}

{% endfor %}
{%- if first %}{{ messages[0]['content'] }}{%- endif -%}
{%- if documents %}{{ documents|tojson }}{% endif %}<|END_OF_TURN_TOKEN|>
{%- for m in messages[(1 if first else 0):] %}{% set role = m.role|lower %}
    {%- if m.tool_calls %}
<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|>{{ m.tool_plan }}<|END_THINKING|><|START_ACTION|>[
    {% for call in m.tool_calls %}
    {"tool_call_id": "{{ ns.calls }}", "parameters": {{ call['function']['arguments']|tojson }}}{% if not loop.last %},{% endif %}

    {% set ns.calls = ns.calls + 1 %}
    {% endfor %}
]<|END_ACTION|><|END_OF_TURN_TOKEN|>
    {%- elif role == 'tool' and m.tool_call_id not in ns.told %}
<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[
        {%- for other in messages[messages.index(m):] %}
            {%- if other.role|lower != 'tool' %}{%- break %}{%- endif %}
{{ result(other) }}{%- set ns.told = ns.told + [other.tool_call_id] %}
        {%- endfor %}

]<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|>
    {%- elif role == 'assistant' or role == 'chatbot' %}
<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>
    {% elif role != 'tool' %}
<|START_OF_TURN_TOKEN|><|{{ role|upper }}_TOKEN|>{{ m.content }}<|END_OF_TURN_TOKEN|>
    {%- endif %}
{%- endfor %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>""",
    "deepseek-r1": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system='') %}
{%- for m in messages %}{%- if m['role'] == 'system' %}{% set ns.system = m['content'] %}{%- endif %}{%- endfor %}
{{ bos_token }}{{ ns.system }}
{%- for m in messages %}
{%- if m['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + m['content']}}{%- endif %}
{%- if m['role'] == 'assistant' and 'tool_calls' in m %}{%- set ns.is_tool = false -%}
{%- for call in m['tool_calls'] %}{%- if not ns.is_first %}
{{- '<｜Assistant｜><｜tool▁calls▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] + '\\n```json\\n' + call['function']['arguments']|tojson + '\\n```<｜tool▁call▁end｜>'}}
{%- set ns.is_first = true -%}{%- else %}{{'\\n' + call['function']['name']}}{%- endif %}{%- endfor %}
{%- elif m['role'] == 'assistant' %}
{%- if ns.is_tool %}{{'<｜tool▁outputs▁end｜>' + m['content'] + eos_token}}{%- set ns.is_tool = false -%}
{%- else %}{% set content = m['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<｜Assistant｜>' + content + eos_token}}{%- endif %}{%- endif %}
{%- if m['role'] == 'tool' %}{%- set ns.is_tool = true -%}
{%- if ns.is_output_first %}{{'<｜tool▁outputs▁begin｜>' + m['content']}}{%- set ns.is_output_first = false %}
{%- else %}{{'\\n' + m['content']}}{%- endif %}{%- endif %}
{%- endfor -%}
{% if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}{% endif %}
{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}""",
    "gpt-oss": """{%- macro type_of(spec) -%}
    {%- if spec.type == 'array' -%}{%- if spec['items'] -%}{{ type_of(spec['items']) + '[]' }}{%- else -%}any[]{%- endif -%}
    {%- elif spec.type is defined and spec.type is iterable and spec.type is not string and spec.type is not mapping -%}{{ spec.type | join(' | ') }}
    {%- elif spec.type == 'string' and spec.enum -%}{{ '"' + spec.enum|join('" | "') + '"' }}
    {%- elif spec.type == 'object' and spec.properties -%}{{- '{\\n' -}}
        {%- for name, prop in spec.properties.items() -%}
            {{ name + (': ' if name in (spec.required or []) else '?: ') }}{{ type_of(prop) }}{{ ', ' if not loop.last else '}' }}
        {%- endfor -%}
    {%- else -%}{{ spec.type or 'any' }}{%- endif -%}
{%- endmacro -%}
{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}
{{- '<|start|>system<|message|>' + (model_identity if model_identity is defined else 'You are a model.') }}
{{- '\\nCurrent date: ' + strftime_now('%Y-%m-%d') + '\\n\\nReasoning: ' + reasoning_effort + '<|end|>' }}
{%- if messages[0].role == 'developer' or messages[0].role == 'system' %}
    {%- set developer = messages[0].content %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set developer = '' %}{%- set loop_messages = messages %}{%- endif %}
{%- if developer or tools %}
    {{- '<|start|>developer<|message|>' + developer }}
    {%- for t in tools or [] %}{%- set t = t.function %}
        {{- '\\n// ' + t.description + '\\ntype ' + t.name + ' = (_: ' }}{{- type_of(t.parameters) }}{{- ') => any;' }}
        {%- for name, prop in t.parameters.properties.items() if prop.default is defined %}
            {{- '\\n// default: ' }}{{- prop.default|tojson if prop.default is not string else prop.default }}
        {%- endfor %}
    {%- endfor %}{{- '<|end|>' }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for m in loop_messages %}
    {%- if m.role == 'assistant' %}
        {%- if 'content' in m and ('<|channel|>analysis<|message|>' in m.content or '<|channel|>final' in m.content) %}
            {{- raise_exception('A message holds channel tags') }}
        {%- endif %}
        {%- if 'tool_calls' in m %}
            {%- set call = m.tool_calls[0] %}{%- if call.function %}{%- set call = call.function %}{%- endif %}
            {%- if m.content and m.thinking %}{{- raise_exception('Both content and thinking') }}
            {%- elif m.content or m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + (m.content or m.thinking) + '<|end|>' }}{%- endif %}
            {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary ' }}
            {{- (call.content_type if call.content_type is defined else 'json') + '<|message|>' }}
            {{- call.arguments|tojson }}{{- '<|call|>' }}{%- set last.name = call.name %}
        {%- elif loop.last and not add_generation_prompt %}
            {%- if 'thinking' in m %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
        {%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{%- set last.name = none %}{%- endif %}
    {%- elif m.role == 'tool' %}
        {%- if last.name is none %}{{- raise_exception('No tool call before') }}{%- endif %}
        {{- '<|start|>functions.' + last.name + ' to=assistant<|channel|>commentary<|message|>' + m.content|tojson + '<|end|>' }}
    {%- elif m.role == 'user' %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}{%- endif %}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
""",
    "falcon3": """{%- if tools %}{{- '<|system|>\\n' }}{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- set remaining = messages[1:] %}
{%- else %}{%- set remaining = messages %}{%- endif %}{{- 'Tools: [' }}{%- for tool in tools %}{{- tool | tojson }}{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- ']\\n' }}
{%- else %}{%- set remaining = messages %}{%- endif %}
{% for m in remaining %}
{% if not loop.last or not add_generation_prompt %}{% set end = eos_token + '\\n' %}{% else %}{% set end = '\\n' %}{% endif %}
{% if m['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\\n' + m['content'] + eos_token + '\\n' }}{% else %}{{ '<|assistant|>\\n' + m['content'] + eos_token }}{% endif %}
{% else %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '\\n' }}{% endif %}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
{% endfor %}""",
}
