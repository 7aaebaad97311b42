/* Intel AMX on a processor without it: a SIGILL handler executes AMX-TILE, AMX-BF16 and AMX-INT8 in 64-bit mode.
 *
 * After the SDM, volume 2, "Intel AMX Instruction Set Reference": the functions below are named after the pages they
 * execute. What is #UD or #GP there ends the process with a message. Each thread has tiles of its own.
 * Not here: RIP-relative operands, address-size and segment prefixes, AMX-FP16 (Sapphire Rapids has none).
 */
#define _GNU_SOURCE
#include <cpuinfo.h>
#include <immintrin.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

/* Palette 1, as CPUID leaf 1DH describes it. */
enum { kTiles = 8, kRows = 16, kRowBytes = 64 };

typedef union {
    uint32_t dwords[kRows][kRowBytes / 4];
    __m512i rows[kRows];
} Tile;

/* LDTILECFG, "Memory Layout". */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t colsb[16];
    uint8_t rows[16];
} TileConfig;
_Static_assert(sizeof(TileConfig) == 64, "the memory operand of LDTILECFG has 64 bytes");

static __thread Tile tiles[kTiles] __attribute__((aligned(64)));
static __thread TileConfig config;

/* VEX.128.<prefix>.0F38.W0 <opcode> /r, as written in the pages' opcode tables. */
typedef enum { NP, P66, PF3, PF2 } Prefix;
typedef struct {
    const uint8_t *code;
    Prefix prefix;
    int opcode, reg, rm, vvvv, length;
    int is_memory, has_sib;
    uint8_t *address; /* base + displacement */
    int64_t stride;   /* index << scale; 0 without an index register */
} Instruction;

static _Noreturn void die(const char *why, const uint8_t *code) {
    fprintf(stderr, "amx: %s; the instruction:", why);
    for (int i = 0; i < 16; ++i) fprintf(stderr, " %02x", code[i]);
    fprintf(stderr, "\n");
    abort();
}

static uint64_t register_value(const ucontext_t *context, int number) {
    static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return (uint64_t)context->uc_mcontext.gregs[order[number]];
}

/* ModR/M, SIB and displacement: SDM volume 2, chapter 2. Returns the first byte after them. */
static const uint8_t *decode_operand(const ucontext_t *context, const uint8_t *p, Instruction *in) {
    const int x = in->code[1] & 0x40 ? 0 : 8, b = in->code[1] & 0x20 ? 0 : 8;
    const int mod = *p >> 6, low = *p & 7;
    in->rm = low | b;
    in->is_memory = mod != 3;
    in->has_sib = in->is_memory && low == 4;
    ++p;
    if (!in->is_memory) return p;
    if (mod == 0 && low == 5) die("RIP-relative operands are not emulated", in->code);
    int displacement_bytes = mod == 1 ? 1 : mod == 2 ? 4 : 0;
    uint64_t address = 0;
    if (in->has_sib) {
        const uint8_t sib = *p++;
        const int index = ((sib >> 3) & 7) | x;
        if (index != 4) in->stride = (int64_t)(register_value(context, index) << (sib >> 6));
        if ((sib & 7) == 5 && mod == 0) displacement_bytes = 4;
        else address = register_value(context, (sib & 7) | b);
    } else {
        address = register_value(context, in->rm);
    }
    int32_t displacement = 0;
    if (displacement_bytes == 1) displacement = (int8_t)*p;
    if (displacement_bytes == 4) memcpy(&displacement, p, 4);
    in->address = (uint8_t *)(address + (uint64_t)(int64_t)displacement);
    return p + displacement_bytes;
}

static Instruction decode(const ucontext_t *context) {
    const uint8_t *code = (const uint8_t *)context->uc_mcontext.gregs[REG_RIP];
    Instruction in = {.code = code};
    /* three-byte VEX, map 0F38, W = 0, L = 0 */
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) die("illegal, and not AMX", code);
    in.prefix = (Prefix)(code[2] & 3);
    in.vvvv = (~code[2] >> 3) & 15;
    in.opcode = code[3];
    in.reg = ((code[4] >> 3) & 7) | (code[1] & 0x80 ? 0 : 8);
    in.length = (int)(decode_operand(context, code + 4, &in) - code);
    return in;
}

static void tilerelease(void) {
    memset(&config, 0, sizeof config);
    memset(tiles, 0, sizeof tiles);
}

static void ldtilecfg(const Instruction *in) {
    TileConfig loaded;
    memcpy(&loaded, in->address, sizeof loaded);
    if (loaded.palette > 1) die("LDTILECFG: #GP, the palette is neither 0 nor 1", in->code);
    tilerelease();
    if (loaded.palette == 0) return;
    for (int i = 0; i < 14; ++i)
        if (loaded.reserved[i]) die("LDTILECFG: #GP, a reserved byte is set", in->code);
    for (int i = 0; i < 16; ++i) {
        const int rows = loaded.rows[i], colsb = loaded.colsb[i];
        if (i >= kTiles ? rows || colsb : rows > kRows || colsb > kRowBytes || !rows != !colsb)
            die("LDTILECFG: #GP, the rows and colsb of a tile", in->code);
    }
    config = loaded;
}

static Tile *valid_tile(const Instruction *in, int number) {
    if (config.palette == 0) die("#UD, TILES_CONFIGURED is 0", in->code);
    if (number >= kTiles || config.rows[number] == 0) die("#UD, a tile that is not valid", in->code);
    return &tiles[number];
}

static void zero_upper_rows(Tile *tile, int rows) {
    for (int m = rows; m < kRows; ++m) tile->rows[m] = _mm512_setzero_si512();
    config.start_row = 0;
}

static void tilezero(const Instruction *in) { zero_upper_rows(valid_tile(in, in->reg), 0); }

/* TILELOADD, TILELOADDT1, TILESTORED */
static void move_tile(const Instruction *in, int is_store) {
    Tile *tile = valid_tile(in, in->reg);
    const int rows = config.rows[in->reg];
    if (config.start_row >= rows) die("#UD, startRow >= rows", in->code);
    const __mmask64 columns = ~0ull >> (64 - config.colsb[in->reg]);
    for (int m = config.start_row; m < rows; ++m) {
        uint8_t *memory = in->address + m * in->stride;
        if (is_store) _mm512_mask_storeu_epi8(memory, columns, tile->rows[m]);
        else tile->rows[m] = _mm512_maskz_loadu_epi8(columns, memory);
    }
    if (is_store) config.start_row = 0;
    else zero_upper_rows(tile, rows);
}

static __m512 even_bf16(__m512i pairs) { return (__m512)_mm512_slli_epi32(pairs, 16); }
static __m512 odd_bf16(__m512i pairs) { return (__m512)_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)); }

/* TDPBF16PS, one row: the even and the odd products are summed apart, then added to the accumulator. */
static __m512i dot_bf16(__m512i accumulator, const uint32_t *src1, const Tile *src2, int depth) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < depth; ++k) {
        const __m512i pairs = _mm512_set1_epi32((int)src1[k]);
        even = _mm512_fmadd_ps(even_bf16(pairs), even_bf16(src2->rows[k]), even);
        odd = _mm512_fmadd_ps(odd_bf16(pairs), odd_bf16(src2->rows[k]), odd);
    }
    return (__m512i)_mm512_add_ps((__m512)accumulator, _mm512_add_ps(even, odd));
}

/* Byte j of every dword, extended to 32 bits. */
static __m512i byte_of(__m512i dwords, int j, int is_signed) {
    const __m512i top = _mm512_slli_epi32(dwords, (unsigned)(24 - 8 * j));
    return is_signed ? _mm512_srai_epi32(top, 24) : _mm512_srli_epi32(top, 24);
}

/* TDPBSSD, TDPBSUD, TDPBUSD, TDPBUUD, one row: sums of 32 bits that wrap. */
static __m512i dot_bytes(__m512i accumulator, const uint32_t *src1, const Tile *src2, int depth, Prefix prefix) {
    const int signed1 = prefix == PF2 || prefix == PF3, signed2 = prefix == PF2 || prefix == P66;
    for (int k = 0; k < depth; ++k)
        for (int j = 0; j < 4; ++j) {
            const __m512i a = byte_of(_mm512_set1_epi32((int)src1[k]), j, signed1);
            const __m512i b = byte_of(src2->rows[k], j, signed2);
            accumulator = _mm512_add_epi32(accumulator, _mm512_mullo_epi32(a, b));
        }
    return accumulator;
}

static void dot_product(const Instruction *in) {
    const int d = in->reg, a = in->rm, b = in->vvvv;
    Tile *dest = valid_tile(in, d);
    const Tile *src1 = valid_tile(in, a), *src2 = valid_tile(in, b);
    if (d == a || d == b || a == b) die("#UD, two operands are the same tile", in->code);
    if (config.colsb[d] % 4 || config.colsb[a] % 4) die("#UD, colsb is no multiple of 4", in->code);
    if (config.rows[d] != config.rows[a] || config.colsb[d] != config.colsb[b] ||
        config.colsb[a] / 4 != config.rows[b])
        die("#UD, the tiles' shapes do not fit", in->code);
    const int depth = config.colsb[a] / 4;
    const __mmask16 columns = (__mmask16)(0xffff >> (16 - config.colsb[d] / 4));
    for (int m = 0; m < config.rows[d]; ++m) {
        const __m512i sum = in->opcode == 0x5c
                                ? dot_bf16(dest->rows[m], src1->dwords[m], src2, depth)
                                : dot_bytes(dest->rows[m], src1->dwords[m], src2, depth, in->prefix);
        dest->rows[m] = _mm512_maskz_mov_epi32(columns, sum);
    }
    zero_upper_rows(dest, config.rows[d]);
}

static void execute(const Instruction *in) {
    if (in->opcode == 0x49 && in->is_memory && in->reg == 0 && in->prefix == NP) ldtilecfg(in);
    else if (in->opcode == 0x49 && in->is_memory && in->reg == 0 && in->prefix == P66)
        memcpy(in->address, &config, sizeof config); /* STTILECFG */
    else if (in->opcode == 0x49 && in->code[4] == 0xc0 && in->prefix == NP) tilerelease();
    else if (in->opcode == 0x49 && !in->is_memory && in->rm == 0 && in->prefix == PF2) tilezero(in);
    else if (in->opcode == 0x4b && in->has_sib && in->prefix != NP) move_tile(in, in->prefix == PF3);
    else if (in->opcode == 0x5c && !in->is_memory && in->prefix == PF3) dot_product(in);
    else if (in->opcode == 0x5e && !in->is_memory) dot_product(in);
    else die("illegal, and no AMX instruction of Sapphire Rapids", in->code);
}

static void on_illegal_instruction(int number, siginfo_t *info, void *context) {
    (void)number, (void)info;
    const Instruction in = decode(context);
    _mm_setcsr(0x9fc0); /* as TDPBF16PS has it: DAZ, FTZ, round to nearest even; the kernel restores the old state */
    execute(&in);
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += in.length;
}

/* Executes AMX from now on, in all threads. Returns 0, or -1 with errno. */
int amx_install(void) {
    struct sigaction action = {.sa_flags = SA_SIGINFO | SA_NODEFER};
    action.sa_sigaction = on_illegal_instruction;
    return sigaction(SIGILL, &action, NULL);
}

/* torch.cpu._is_amx_tile_supported() and ATen ask cpuinfo. */
void amx_claim(void) {
    cpuinfo_initialize();
    cpuinfo_isa.amx_tile = cpuinfo_isa.amx_int8 = cpuinfo_isa.amx_bf16 = true;
}
