#define LEAPALIGN_ISA avx512
#include "vector_avx512.h"

#include "table.h"
