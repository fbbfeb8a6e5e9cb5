#define LEAPALIGN_ISA avx2
#include "vectors/vector_avx2.h"

#include "vectors/table.h"
