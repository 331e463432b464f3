/* Records: no byte of input can forge, split or lose one (I13): what comes out is one line without control bytes, or nothing. */
#include <stdlib.h>
#include <string.h>

#include "json.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
	static char line[NW_RECORD_MAX];
	struct nw_json j;
	size_t half = size / 2, len;
	char *text = malloc(size + 2);
	const char *two[2];

	if (!text) abort();
	memcpy(text, data, half);
	text[half] = '\0';
	memcpy(text + half + 1, data + half, size - half);
	text[size + 1] = '\0';
	two[0] = text;
	two[1] = text + half + 1;
	nw_json_begin(&j, line, size % 7 ? sizeof line : size, size % 2 ? sizeof line : 64);
	nw_json_int(&j, "event.sequence", (int64_t)size);
	nw_json_string(&j, "nodewrap.declared.id", two[0]);
	nw_json_strings(&j, "process.args", two, 2);
	nw_json_bool(&j, "nodewrap.isolation.seccomp", true);
	len = nw_json_end(&j);
	for (size_t i = 0; i < len; i++)
		if ((unsigned char)line[i] < 0x20 && !(i == len - 1 && line[i] == '\n')) abort();
	if (len && (line[0] != '{' || line[len - 1] != '\n' || line[len - 2] != '}')) abort();
	free(text);
	return 0;
}
