/*
 * replay.c - runs a target once over each saved input, for machines whose compiler has no fuzzer.
 *
 *   replay_name FOLDER     a finding ends the run; the last line "reading ..." on stderr then names the input
 */
#include <dirent.h>

#include "fuzz.h"

static void replay(const char *folder, const char *name) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END) != 0) {
        perror(path);
        exit(EXIT_FAILURE);
    }
    size_t size = (size_t)ftell(file);
    rewind(file);
    uint8_t *data = fuzz_block(size);
    MUST(fread(data, 1, size, file) == size);
    fclose(file);
    /* Said before, since whatever finds something ends the process. */
    fprintf(stderr, "reading %s\n", path);
    LLVMFuzzerTestOneInput(data, size);
    free(data);
}

int main(int argc, char **argv) {
    DIR *folder = argc == 2 ? opendir(argv[1]) : NULL;
    if (!folder) {
        fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
        return EXIT_FAILURE;
    }
    int inputs = 0;
    for (struct dirent *entry = readdir(folder); entry; entry = readdir(folder)) {
        if (entry->d_name[0] == '.') continue;
        replay(argv[1], entry->d_name);
        inputs++;
    }
    closedir(folder);
    printf("%d executions\n", inputs);
    return inputs > 0 ? EXIT_SUCCESS : EXIT_FAILURE; /* an empty corpus proves nothing */
}
