#include "alignment.h"

#include <stdlib.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v3")
#endif
#define CREPA_LEVEL avx2
#include "tasks.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
