#include "alignment.h"

#include <stdlib.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define CREPA_LEVEL generic
#include "tasks.h"
