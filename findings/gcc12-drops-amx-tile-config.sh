#!/usr/bin/env bash
# GCC 12.2 (Debian 12's compiler), amxtileintrin.h: a tile configuration set field by field before _tile_loadconfig
# is dropped by the optimizer, all but its first eight bytes.
#
# A good engineer expects: _tile_loadconfig(&config) reads the whole 64-byte configuration, so every field written before
# it is in memory when LDTILECFG runs.
# What happens: the intrinsic is inline assembly whose only memory operand is `*(const void **)config`, eight bytes. At -O2
# the stores to the rest (bytes per row, rows per tile) are dead code. The tiles are configured with no rows, and the
# first instruction on one raises #UD.
# Where it bites this field: llama-cpp-python 0.3.36 compiled from its source archive with GGML_NATIVE, its default, on a
# processor with AMX: libggml-cpu's Q4_K and Q8_0 matrix products ended the process with an illegal instruction, while f16
# models, which do not use AMX there, worked. -mno-amx-tile -mno-amx-int8 avoids it.
# Nothing is executed here that was compiled: the assembly is read. Seen on Debian 12, gcc 12.2.0-14+deb12u1.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
command -v gcc-12 >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc-12 libc6-dev >/dev/null; }
version=$(gcc-12 -dumpfullversion)
echo "gcc-12 $version"

cat > "$work/tiles.c" <<'C'
#include <immintrin.h>
#include <stdint.h>
struct config { uint8_t palette, start, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; };
#ifdef WHOLE_OPERAND
static void load(const struct config *c) { __asm__ volatile("ldtilecfg %0" : : "m"(*c)); }
#else
static void load(const struct config *c) { _tile_loadconfig(c); }
#endif
void configure(void) {
    struct config c = {0};
    c.palette = 1;
    c.rows[0] = 13;        /* a number that occurs nowhere else */
    c.row_bytes[0] = 57;
    load(&c);
}
C
gcc-12 -O2 -mamx-tile -S -o "$work/intrinsic.s" "$work/tiles.c"
gcc-12 -O2 -mamx-tile -DWHOLE_OPERAND -S -o "$work/whole.s" "$work/tiles.c"
stores() { grep -cE 'mov[bwlq][[:space:]]+\$(13|57),' "$1" || true; }
echo "stores of rows and row bytes: $(stores "$work/intrinsic.s") with the intrinsic, $(stores "$work/whole.s") with a 64-byte operand"

# Seen: 0 and 2.
[ "$(stores "$work/intrinsic.s")" = 0 ] && [ "$(stores "$work/whole.s")" = 2 ] && case $version in 12.[0-3].*) ;; *) false ;; esac
